from __future__ import annotations

from i3lm.data.split import held_out_documents, is_held_out, training_documents

DOCUMENTS = [f"document {number}" for number in range(2000)]


def test_every_document_falls_on_one_side():
    held_out = list(held_out_documents(DOCUMENTS, 0.1))
    training = list(training_documents(DOCUMENTS, 0.1))
    assert sorted(held_out + training) == sorted(DOCUMENTS)
    assert not set(held_out) & set(training)
    # Five standard deviations of a binomial of 2,000 draws at 0.1.
    assert abs(len(held_out) - 200) < 67


def test_duplicates_fall_on_the_same_side():
    doubled = DOCUMENTS + DOCUMENTS[::-1]
    held_out = set(held_out_documents(doubled, 0.3))
    assert not held_out & set(training_documents(doubled, 0.3))


def test_larger_fraction_holds_out_more_of_the_same():
    small, large = (set(held_out_documents(DOCUMENTS, f)) for f in (0.05, 0.2))
    assert small < large


def test_ends():
    assert not any(is_held_out(document, 0) for document in DOCUMENTS)
    assert all(is_held_out(document, 1) for document in DOCUMENTS)


def test_decision_is_for_ever():
    # A change here would leak held-out documents into runs that are resumed or fine-tuned.
    recorded = [40, 44, 59, 70, 81]
    assert [n for n in range(100) if is_held_out(f"document {n}", 0.1)] == recorded
