"""What users have reported is right on FakeStrategy, or refused by name; and their mistakes are explained."""

import mistakes
import pytest
import reported
import reported_around


def test_on_fake_strategy():
    assert reported.unexpected_outcomes(reported.outcomes("fake"), "fake") == []


def test_around_the_updates(tmp_path):
    found = reported_around.outcomes("fake", str(tmp_path))
    assert list(reported_around.unexpected_outcomes(found, "fake")) == []


def test_mistakes_are_explained(tmp_path):
    found = {name: mistakes.error_of(mistake) for name, mistake in mistakes.SETTINGS.items()}
    assert mistakes.incomplete_messages(found | mistakes.error_messages("fake", str(tmp_path))) == []


@pytest.mark.parametrize("error", [
    "nothing was raised", "raw TypeError: save: expected a path, got 5. Pass one", "ArgumentError: save: got 5. Pass one",
    "ArgumentError: save: expected a path. Pass one", "ArgumentError: save: expected a path, got 5",
    "ArgumentError: expected a path, got 5. Pass one", f"ArgumentError: save: expected a path, got {'5' * 800}. Pass one",
])  # fmt: skip
def test_an_error_that_lacks_something_is_noticed(error):
    assert mistakes.missing_parts(error)
    assert not mistakes.missing_parts("ArgumentError: save: expected a path, got int (5). Pass one")
