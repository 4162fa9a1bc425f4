"""Dates and times by what they mean, not by how they are written."""

import pytest

from insightv.assessment.dates import moment

R, W, U, NONE = True, False, None, "not its business"


@pytest.mark.parametrize(
    ("truth", "given", "expected"),
    [
        ("March 3, 2021", "3 March 2021", R),
        ("March 3, 2021", "2021-03-03", R),
        ("March 3, 2021", "It was signed on the 3rd of March, 2021.", R),
        ("March 3, 2021", "Mar. 3, 2021", R),
        ("2021-03-04", "2021/03/05", W),
        ("March 3, 2021", "March 3, 2012", W),
        ("March 4, 2021", "03/04/2021", U),
        ("13/04/2021", "April 13, 2021", R),
        ("April 13, 2021", "04/13/2021", R),
        ("March 4, 2021", "05/06/2021", W),
        ("2:30 PM", "14:30", R),
        ("14:30", "2.30 p.m.", R),
        ("2:30 PM", "2:30", U),
        ("2:30 PM", "2:30 am", W),
        ("12:15 AM", "00:15", R),
        ("March 3, 2021", "March 2021", NONE),
        ("March 3, 2021", "March 3, 2021 or March 4, 2021", NONE),
        ("March 3, 2021", "not on March 3, 2021", NONE),
        ("March 3, 2021", "2:30 PM", NONE),
        ("14.67", "14:40", NONE),
        ("a letter of March 3, 2021", "March 3, 2021", NONE),
        ("31/31/2021", "2021-01-31", NONE),
    ],
)
def test_dates_and_times(truth, given, expected):
    decision = moment(truth, given)
    assert (NONE if decision is None else decision.correct) == expected
