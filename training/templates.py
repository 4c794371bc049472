"""The templates: forty short stories over ten operation patterns, two to five steps each."""

from .problems import Noun, Story, template

DAY, HOUR = Noun("day", "days"), Noun("hour", "hours")
MINUTE, WEEK, YEAR = Noun("minute", "minutes"), Noun("week", "weeks"), Noun("year", "years")
MILE, PAGE = Noun("mile", "miles"), Noun("page", "pages")
BOX, BAG, PACK = Noun("box", "boxes"), Noun("bag", "bags"), Noun("pack", "packs")
FRIEND, CHILD, SEAT = Noun("friend", "friends"), Noun("child", "children"), Noun("seat", "seats")
POINT, TREE, ROW = Noun("point", "points"), Noun("tree", "trees"), Noun("row", "rows")


# packs: so many in each


@template("packs")
def packs_given_away(s: Story) -> str:
    p, x = s.person(), s.item()
    packs, size = s.n(2, 9), s.n(3, 15)
    gone = s.n(1, packs * size - 1)
    total = s.step(f"{p} buys", packs, "*", size, x)
    s.step(f"{p.He} has", total, "-", gone, x, "left")
    return (
        f"{p} buys {PACK(packs)} of {x.many}. Each pack holds {x(size)}. {p.He} gives away "
        f"{x(gone)}. How many {x.many} does {p.he} have left?"
    )


@template("packs")
def packs_of_two_sizes(s: Story) -> str:
    p, x = s.person(), s.item()
    small, big, a, b = s.n(3, 8), s.n(9, 20), s.n(2, 9), s.n(2, 9)
    first = s.step("The small packs hold", a, "*", small, x)
    second = s.step("The big packs hold", b, "*", big, x)
    s.step(f"{p} has", first, "+", second, x)
    return (
        f"A small pack holds {x(small)} and a big pack holds {x(big)}. {p} has {a} small packs "
        f"and {b} big packs. How many {x.many} does {p.he} have?"
    )


@template("packs")
def packs_added_to_some(s: Story) -> str:
    p, x = s.person(), s.item("kept", "colourful")
    had, boxes, size, lost = s.n(5, 60), s.n(2, 9), s.n(4, 12), s.n(1, 5)
    new = s.step(f"{p} gets", boxes, "*", size, "", f"new {x.many}")
    total = s.step(f"{p.He} then has", had, "+", new, x)
    s.step("After the loss there are", total, "-", lost, x)
    return (
        f"{p} has {x(had)}. {p.He} gets {BOX(boxes)} with {x(size)} in each box, and then loses "
        f"{x(lost)}. How many {x.many} does {p.he} have now?"
    )


@template("packs")
def packs_needed(s: Story) -> str:
    p, x = s.person(), s.item()
    size, packs, children = s.n(2, 9), s.n(2, 6), s.n(2, 6)
    each = size * packs
    need = s.step(f"{p} needs", children, "*", each, x)
    s.step(f"{p.He} must buy", need, "/", size, PACK)
    return (
        f"{p} wants to give {x(each)} to each of {CHILD(children)}. A pack holds {x(size)}. "
        f"How many packs must {p.he} buy?"
    )


# sharing: equal parts without a remainder


@template("sharing")
def share_what_is_left(s: Story) -> str:
    p, x = s.person(), s.item()
    friends, each, kept = s.n(2, 9), s.n(2, 12), s.n(1, 20)
    total = friends * each + kept
    left = s.step(f"{p} shares", total, "-", kept, x)
    s.step("Each friend gets", left, "/", friends, x)
    return (
        f"{p} has {x(total)}. {p.He} keeps {kept} and shares the rest equally among "
        f"{FRIEND(friends)}. How many {x.many} does each friend get?"
    )


@template("sharing")
def share_two_piles(s: Story) -> str:
    p, x = s.person(), s.item("colourful")
    children, each = s.n(2, 9), s.n(3, 15)
    total = children * each
    red = s.n(1, total - 1)
    s.step("Together there are", red, "+", total - red, x)
    s.step("Each child gets", total, "/", children, x)
    return (
        f"{p} has {red} red {x.of(red)} and {total - red} blue {x.of(total - red)}. {p.He} shares "
        f"them all equally among {CHILD(children)}. How many {x.many} does each child get?"
    )


@template("sharing")
def share_packs(s: Story) -> str:
    p, x = s.person(), s.item()
    friends, each, packs = s.n(2, 9), s.n(2, 9), s.n(2, 6)
    size = friends * each
    total = s.step(f"{p} has", packs, "*", size, x)
    s.step("Each friend gets", total, "/", friends, x)
    return (
        f"{p} opens {PACK(packs)} of {x(size)} and shares all the {x.many} equally among "
        f"{FRIEND(friends)}. How many {x.many} does each friend get?"
    )


@template("sharing")
def share_then_receive(s: Story) -> str:
    p, q = s.people()
    x = s.item("kept", "colourful")
    people, each, more, eaten = s.n(2, 9), s.n(3, 12), s.n(2, 30), s.n(1, 4)
    share = s.step(f"{p}'s share is", people * each, "/", people, x)
    now = s.step(f"With the gift {p} has", share, "+", more, x)
    s.step(f"In the end {p.he} has", now, "-", eaten, x)
    return (
        f"{p} and the others, {people} people in all, share {x(people * each)} equally. Then {q} "
        f"gives {p} {more} more, and {p} loses {eaten}. How many {x.many} does {p} have?"
    )


# rates: so many per hour or day


@template("rates")
def rate_two_speeds(s: Story) -> str:
    p, x = s.person(), s.item()
    slow, fast, a, b = s.n(2, 9), s.n(10, 20), s.n(2, 9), s.n(2, 9)
    first = s.step("The first part gives", a, "*", slow, x)
    second = s.step("The second part gives", b, "*", fast, x)
    s.step(f"{p} packs", first, "+", second, x)
    return (
        f"{p} packs {x(slow)} an hour for {HOUR(a)} and then {x(fast)} an hour for {HOUR(b)}. "
        f"How many {x.many} does {p.he} pack?"
    )


@template("rates")
def rate_days_to_goal(s: Story) -> str:
    p, x = s.person(), s.item("kept", "colourful")
    per_day, days, have = s.n(2, 9), s.n(2, 15), s.n(3, 60)
    goal = have + per_day * days
    need = s.step(f"{p} still needs", goal, "-", have, x)
    s.step("That takes", need, "/", per_day, DAY)
    return (
        f"{p} has {x(have)} and wants to have {goal}. {p.He} collects {x(per_day)} a day. "
        f"How many days does {p.he} need?"
    )


@template("rates")
def rate_pages(s: Story) -> str:
    p = s.person()
    per_day, days, rest = s.n(4, 20), s.n(2, 9), s.n(5, 90)
    total = per_day * days + rest
    read = s.step(f"{p} reads", days, "*", per_day, PAGE)
    s.step("That leaves", total, "-", read, PAGE)
    return (
        f"{p} reads {PAGE(per_day)} a day. {p.His} book has {PAGE(total)}. How many pages are left "
        f"after {DAY(days)}?"
    )


@template("rates")
def rate_miles(s: Story) -> str:
    p, q = s.people()
    a, b, hours = s.n(3, 12), s.n(3, 12), s.n(2, 9)
    first = s.step(f"{p} rides", a, "*", hours, MILE)
    second = s.step(f"{q} rides", b, "*", hours, MILE)
    s.step("Together they ride", first, "+", second, MILE)
    return (
        f"{p} rides {MILE(a)} an hour and {q} rides {MILE(b)} an hour. How many miles do they ride "
        f"together in {HOUR(hours)}?"
    )


# doubling and halving


@template("doubling")
def double_then_lose(s: Story) -> str:
    p, x = s.person(), s.item("kept", "colourful")
    start = s.n(4, 60)
    lost = s.n(1, 2 * start - 1)
    twice = s.step(f"{p} has", start, "*", 2, x, "after doubling")
    s.step(f"{p.He} has", twice, "-", lost, x, "left")
    return (
        f"{p} has {x(start)} and doubles that number. Then {p.he} loses {lost}. How many {x.many} "
        f"does {p.he} have left?"
    )


@template("doubling")
def half_sold_each_day(s: Story) -> str:
    p, x = s.person(), s.item("made")
    quarter, more = s.n(2, 40), s.n(2, 40)
    half = s.step("After the first day there are", 4 * quarter, "/", 2, x)
    rest = s.step("After the second day there are", half, "/", 2, x)
    s.step(f"In the end {p} has", rest, "+", more, x)
    return (
        f"{p} has {x(4 * quarter)}. {p.He} sells half of them on the first day and half of the "
        f"rest on the second day, then makes {more} more. How many {x.many} does {p.he} have?"
    )


@template("doubling")
def twice_as_many_total(s: Story) -> str:
    p, q = s.people()
    x, n, more = s.item("kept", "colourful"), s.n(3, 60), s.n(1, 30)
    twice = s.step(f"{q} has", n, "*", 2, x)
    both = s.step("Together they have", n, "+", twice, x)
    s.step("With the new ones they have", both, "+", more, x)
    return (
        f"{p} has {x(n)}. {q} has twice as many. They find {more} more. How many {x.many} do they "
        f"have together?"
    )


@template("doubling")
def half_as_many_left(s: Story) -> str:
    p, q = s.people()
    x, half = s.item(), s.n(3, 60)
    gone = s.n(1, half - 1)
    n = s.step(f"{q} has", 2 * half, "/", 2, x)
    s.step(f"{q} keeps", n, "-", gone, x)
    return (
        f"{p} has {x(2 * half)}. {q} has half as many as {p}, but gives away {gone}. How many "
        f"{x.many} does {q} keep?"
    )


# comparison: k more than, k fewer than


@template("comparison")
def more_than_total(s: Story) -> str:
    p, q = s.people()
    x, n, k = s.item(), s.n(5, 80), s.n(1, 40)
    other = s.step(f"{q} has", n, "+", k, x)
    s.step("Together they have", n, "+", other, x)
    return (
        f"{p} has {x(n)}. {q} has {k} more than {p}. How many {x.many} do they have together?"
    )


@template("comparison")
def fewer_than_total(s: Story) -> str:
    p, q = s.people()
    x, n = s.item(), s.n(5, 90)
    k = s.n(1, n - 1)
    other = s.step(f"{q} has", n, "-", k, x)
    s.step("Together they have", n, "+", other, x)
    return (
        f"{p} has {x(n)}. {q} has {k} fewer than {p}. How many {x.many} do they have together?"
    )


@template("comparison")
def times_and_more(s: Story) -> str:
    p, q = s.people()
    x, n, times, k = s.item(), s.n(3, 15), s.n(3, 9), s.n(1, 20)
    product = s.step(f"{times} times {p}'s number is", n, "*", times)
    other = s.step(f"{q} has", product, "+", k, x)
    s.step("The difference is", other, "-", n, x)
    return (
        f"{p} has {x(n)}. {q} has {k} more than {times} times as many. How many more {x.many} does "
        f"{q} have than {p}?"
    )


@template("comparison")
def chain_of_three(s: Story) -> str:
    p, q = s.people()
    x, n, k = s.item(), s.n(5, 60), s.n(1, 30)
    m = s.n(1, n + k - 1)
    second = s.step(f"{q} has", n, "+", k, x)
    third = s.step("The teacher has", second, "-", m, x)
    first_two = s.step(f"{p} and {q} have", n, "+", second, x)
    s.step("All three have", first_two, "+", third, x)
    return (
        f"{p} has {x(n)}. {q} has {k} more than {p}. Their teacher has {m} fewer than {q}. How "
        f"many {x.many} do all three have?"
    )


# two people: giving, joining, evening out


@template("two_people")
def gift_between_two(s: Story) -> str:
    p, q = s.people()
    x, a, b = s.item(), s.n(20, 90), s.n(5, 60)
    k = s.n(1, a - 10)
    left = s.step(f"{p} has", a, "-", k, x, "left")
    now = s.step(f"{q} has", b, "+", k, x)
    if left == now:
        now = s.step("Together they have", left, "+", now, x)
        ask = f"How many {x.many} do they have together?"
    elif left > now:
        s.step("The difference is", left, "-", now, x)
        ask = f"How many more {x.many} does {p} have than {q} now?"
    else:
        s.step("The difference is", now, "-", left, x)
        ask = f"How many more {x.many} does {q} have than {p} now?"
    return f"{p} has {x(a)} and {q} has {x(b)}. {p} gives {q} {k}. {ask}"


@template("two_people")
def two_collect(s: Story) -> str:
    p, q = s.people()
    x, a, b, days = s.item("kept", "colourful"), s.n(2, 15), s.n(2, 15), s.n(2, 9)
    per_day = s.step("In a day they find", a, "+", b, x)
    s.step("In all they find", per_day, "*", days, x)
    return (
        f"{p} finds {x(a)} a day and {q} finds {x(b)} a day. How many {x.many} do they find "
        f"together in {DAY(days)}?"
    )


@template("two_people")
def two_even_out(s: Story) -> str:
    p, q = s.people()
    x, half = s.item(), s.n(5, 70)
    a = s.n(1, 2 * half - 1)
    more = s.n(1, 20)
    s.step("Together they have", a, "+", 2 * half - a, x)
    each = s.step("Each of them gets", 2 * half, "/", 2, x)
    s.step(f"Then {p} has", each, "+", more, x)
    return (
        f"{p} has {x(a)} and {q} has {x(2 * half - a)}. They put them together and share them "
        f"equally. Then {p} buys {more} more. How many {x.many} does {p} have now?"
    )


@template("two_people")
def two_points(s: Story) -> str:
    p, q = s.people()
    a, b, k, m = s.n(2, 9), s.n(2, 9), s.n(2, 9), s.n(2, 12)
    first = s.step(f"{p} scores", a, "*", k, POINT)
    second = s.step(f"{q} scores", b, "*", m, POINT)
    s.step("Together they score", first, "+", second, POINT)
    return (
        f"{p} wins {a} games at {POINT(k)} each. {q} wins {b} games at {POINT(m)} each. How many "
        f"points do they score together?"
    )


# money: prices, change, savings


@template("money")
def change_from_bill(s: Story) -> str:
    p, x = s.person(), s.item()
    n, price, bill = s.n(2, 9), s.n(2, 9), s.pick(100, 200)
    cost = s.step(f"The {x.many} cost", n, "*", price, "$")
    s.step(f"{p} gets back", bill, "-", cost, "$")
    return (
        f"{p} buys {x(n)} at ${price} each and pays with ${bill}. How many dollars does {p.he} get "
        f"back?"
    )


@template("money")
def two_purchases(s: Story) -> str:
    p = s.person()
    x, y = (s.item() for _ in range(2))
    while y == x:
        y = s.item()
    a, b, price_a, price_b = s.n(2, 9), s.n(2, 9), s.n(2, 12), s.n(2, 12)
    first = s.step(f"The {x.many} cost", a, "*", price_a, "$")
    second = s.step(f"The {y.many} cost", b, "*", price_b, "$")
    s.step(f"{p} pays", first, "+", second, "$")
    return (
        f"{p} buys {x(a)} at ${price_a} each and {y(b)} at ${price_b} each. How many dollars does "
        f"{p.he} pay?"
    )


@template("money")
def profit_on_sales(s: Story) -> str:
    p, x = s.person(), s.item()
    n, cost, gain = s.n(3, 15), s.n(2, 9), s.n(1, 9)
    each = s.step(f"{p} gains", cost + gain, "-", cost, "$", f"on each {x.one}")
    s.step("On all of them that is", n, "*", each, "$")
    return (
        f"{p} buys {x(n)} at ${cost} each and sells them at ${cost + gain} each. How many dollars "
        f"does {p.he} gain?"
    )


@template("money")
def weeks_of_saving(s: Story) -> str:
    p = s.person()
    earn, weeks, have = s.n(8, 25), s.n(2, 9), s.n(5, 60)
    spend = s.n(1, earn - 4)
    saved = s.step(f"{p} saves", earn, "-", spend, "$", "a week")
    more = s.step("That comes to", saved, "*", weeks, "$")
    s.step(f"{p.He} then has", have, "+", more, "$")
    return (
        f"{p} has ${have}. {p.He} earns ${earn} a week and spends ${spend} of it. How many dollars "
        f"does {p.he} have after {WEEK(weeks)}?"
    )


# time


@template("time")
def minutes_in_a_week(s: Story) -> str:
    p = s.person()
    a, b, days = s.n(5, 40), s.n(5, 40), s.n(2, 7)
    per_day = s.step("In a day that is", a, "+", b, MINUTE)
    s.step(f"In {DAY(days)} that is", per_day, "*", days, MINUTE)
    return (
        f"Every day {p} plays for {MINUTE(a)} and reads for {MINUTE(b)}. How many minutes is that "
        f"in {DAY(days)}?"
    )


@template("time")
def hours_to_minutes(s: Story) -> str:
    p = s.person()
    hours, used = s.n(2, 5), s.n(5, 90)
    pause = s.n(1, 20)
    total = s.step(f"{p} has", hours, "*", 60, MINUTE)
    left = s.step("After the work there are", total, "-", used, MINUTE)
    s.step("After the break there are", left, "-", pause, MINUTE)
    return (
        f"{p} has {HOUR(hours)}. {p.He} works for {MINUTE(used)} and takes a break of "
        f"{MINUTE(pause)}. How many minutes are left?"
    )


@template("time")
def ages(s: Story) -> str:
    p, q = s.people()
    age, k, years = s.n(4, 40), s.n(2, 30), s.n(2, 20)
    other = s.step(f"{q} is", age, "+", k, YEAR, "old")
    s.step(f"Then {q} is", other, "+", years, YEAR, "old")
    return (
        f"{p} is {YEAR(age)} old. {q} is {YEAR(k)} older than {p}. How old is {q} in {YEAR(years)}?"
    )


@template("time")
def practice_weeks(s: Story) -> str:
    p = s.person()
    per_day, days, weeks, missed = s.n(2, 6), s.n(2, 6), s.n(2, 9), s.n(1, 6)
    per_week = s.step("In a week that is", per_day, "*", days, HOUR)
    total = s.step("The plan has", per_week, "*", weeks, HOUR)
    s.step(f"{p} trains for", total, "-", missed, HOUR)
    return (
        f"{p} plans to train {HOUR(per_day)} a day, {DAY(days)} a week, for {WEEK(weeks)}. {p.He} "
        f"misses {HOUR(missed)}. How many hours does {p.he} train?"
    )


# groups: rows, shelves, seats


@template("groups")
def rows_of_trees(s: Story) -> str:
    p = s.person()
    rows, per_row, more, dead = s.n(2, 9), s.n(3, 20), s.n(2, 30), s.n(1, 6)
    planted = s.step("The rows hold", rows, "*", per_row, TREE)
    total = s.step("With the new ones there are", planted, "+", more, TREE)
    s.step("In the end there are", total, "-", dead, TREE)
    return (
        f"{p} plants {ROW(rows)} of {TREE(per_row)}. {p.He} plants {more} more and cuts down "
        f"{dead}. How many trees are there now?"
    )


@template("groups")
def seats_free(s: Story) -> str:
    p = s.person()
    rows, seats = s.n(3, 12), s.n(4, 9)
    total = rows * seats
    adults = s.n(1, total - 2)
    children = s.n(1, total - adults - 1)
    s.step("The hall has", rows, "*", seats, SEAT)
    free = s.step("After the adults there are", total, "-", adults, "", "free")
    s.step("After the children there are", free, "-", children, "", "free")
    adults_sit = f"{adults} adult sits" if adults == 1 else f"{adults} adults sit"
    children_sit = f"{children} child sits" if children == 1 else f"{children} children sit"
    return (
        f"{p} works in a hall with {rows} rows of {SEAT(seats)}. {adults_sit} down, and then "
        f"{children_sit} down. How many seats are free?"
    )


@template("groups")
def bags_from_rows(s: Story) -> str:
    p, x = s.person(), s.item()
    size, bags, rows = s.n(2, 9), s.n(2, 9), s.n(2, 6)
    per_row = size * bags
    total = s.step("The rows hold", rows, "*", per_row, x)
    filled = s.step(f"{p} fills", total, "/", size, BAG)
    sold = s.n(1, filled - 1)
    s.step("That leaves", filled, "-", sold, BAG)
    return (
        f"{p} lays out {ROW(rows)} of {x(per_row)} and packs them all in bags of {size}. {p.He} "
        f"sells {BAG(sold)}. How many bags are left?"
    )


@template("groups")
def three_shelves(s: Story) -> str:
    p, x = s.person(), s.item()
    a, b, c = s.n(3, 60), s.n(3, 60), s.n(3, 60)
    two = s.step("The first two shelves hold", a, "+", b, x)
    three = s.step("All three shelves hold", two, "+", c, x)
    sold = s.n(1, three - 1)
    s.step("That leaves", three, "-", sold, x)
    return (
        f"The shelves of {p}'s shop hold {a}, {b} and {c} {x.many}. {p.He} sells {sold}. How many "
        f"{x.many} are left?"
    )


# change over days: up and down


@template("up_and_down")
def three_days(s: Story) -> str:
    p, x = s.person(), s.item()
    start, monday, friday = s.n(20, 90), s.n(2, 30), s.n(2, 60)
    gone = s.n(1, start + monday - 1)
    first = s.step("After Monday there are", start, "+", monday, x)
    second = s.step("After Tuesday there are", first, "-", gone, x)
    s.step("After Friday there are", second, "+", friday, x)
    return (
        f"{p} has {x(start)}. {p.He} gets {monday} on Monday, sells {gone} on Tuesday and gets "
        f"{friday} on Friday. How many {x.many} does {p.he} have then?"
    )


@template("up_and_down")
def made_and_sold(s: Story) -> str:
    p, x = s.person(), s.item("made")
    made, days, price = s.n(5, 15), s.n(2, 6), s.n(2, 5)
    kept = s.n(1, made * days - 2)
    total = s.step(f"{p} makes", made, "*", days, x)
    sold = s.step(f"{p.He} sells", total, "-", kept, x)
    s.step(f"{p.He} earns", sold, "*", price, "$")
    return (
        f"{p} makes {x(made)} a day for {DAY(days)}. {p.He} keeps {kept} and sells the rest at "
        f"${price} each. How many dollars does {p.he} earn?"
    )


@template("up_and_down")
def growing_each_week(s: Story) -> str:
    p, x = s.person(), s.item("picked")
    n, k = s.n(5, 40), s.n(2, 20)
    second = s.step("In the second week it is", n, "+", k, x)
    third = s.step("In the third week it is", second, "+", k, x)
    two = s.step("The first two weeks make", n, "+", second, x)
    three = s.step("All three weeks make", two, "+", third, x)
    gone = s.n(1, three - 1)
    s.step(f"{p} keeps", three, "-", gone, x)
    return (
        f"{p} picks {x(n)} in the first week. Each week {p.he} picks {k} more than in the week "
        f"before. After three weeks {p.he} gives away {gone}. How many {x.many} does {p.he} keep?"
    )


@template("up_and_down")
def lost_and_shared(s: Story) -> str:
    p, q = s.people()
    x, each, friends = s.item(), s.n(2, 12), s.n(2, 9)
    bad, per_box = s.n(1, 9), s.n(2, 5)
    good = each * friends
    while (good + bad) % per_box:
        bad += 1
    boxes = (good + bad) // per_box
    total = s.step("The boxes hold", boxes, "*", per_box, x)
    rest = s.step("Without the bad ones there are", total, "-", bad, x)
    share = s.step("Each friend gets", rest, "/", friends, x)
    s.step(f"Then {q} has", share, "+", share, x)
    return (
        f"{p} has {BOX(boxes)} of {x(per_box)}. {p.He} throws {bad} away and shares the rest "
        f"equally among {FRIEND(friends)}. {q}, one of them, buys as many again. How many {x.many} "
        f"does {q} have?"
    )
