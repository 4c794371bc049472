"""(placeholder, replaced below)"""
def write_card(target):
    pass
