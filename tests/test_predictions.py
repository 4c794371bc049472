"""What the reader expected is kept, and a damaged file costs nothing but what it held."""

from helpers import predictions


def test_what_is_kept_is_there_again_and_the_last_one_counts(tmp_workspace):
    assert predictions.kept() == {}
    predictions.keep("ratios", [1.5, 1, 1])
    predictions.keep("lost", 3)
    predictions.keep("ratios", [1.9, 1.2, 0.8])
    assert predictions.kept() == {"ratios": [1.9, 1.2, 0.8], "lost": 3}


def test_a_damaged_file_is_none(tmp_workspace):
    predictions.keep("lost", 3)
    (tmp_workspace / predictions.FILE).write_text('{"lost": ')
    assert predictions.kept() == {}
    predictions.keep("lost", 4)
    assert predictions.kept() == {"lost": 4}
