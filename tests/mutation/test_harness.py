"""The harness draws changes that are changes, and shows a mutant to the tests that run its line."""

from tests.mutation.mutants import ROOT, files, in_order, is_a_change, part_of, seen_by


SOURCE = '''\
LIMIT = 3


def inside(x: int | None = None, y: int = 0):
    """Whether."""
    if x is None:
        return False
    total = (
        x
        + y
    )
    return total < LIMIT
'''


def test_annotations_and_what_cannot_be_compiled_are_no_mutants():
    assert is_a_change(SOURCE, SOURCE.replace("x is None", "x is not None"))
    assert is_a_change(SOURCE, SOURCE.replace("y: int = 0", "y: int = 1"))
    assert not is_a_change(SOURCE, SOURCE.replace("int | None", "int + None"))
    assert not is_a_change(SOURCE, SOURCE.replace("+ y", "+ / y"))
    assert not is_a_change(SOURCE, SOURCE)


def test_a_mutant_gets_the_tests_that_ran_its_statement():
    contexts = {6: {"one", "two"}, 7: {"one"}, 9: {"two"}, 12: {"two", "three"}}
    assert seen_by(SOURCE, 7, contexts) == {"one"}
    assert seen_by(SOURCE, 6, contexts) == {"one", "two"}  # the head of a block, without what it holds
    assert seen_by(SOURCE, 10, contexts) == {"two"}  # a line of a statement that starts above
    assert seen_by(SOURCE, 4, contexts) == {"one", "two", "three"}  # a signature: all that ran the function
    assert seen_by(SOURCE, 1, contexts) == {"one", "two", "three"}  # a constant: all that ran the module
    assert seen_by(SOURCE, 7, {}) == set()


def test_files_take_turns_narrow_tests_come_first_and_the_subject_s_own_file_more_often():
    breadth = {
        "test_a.py::f[1]": 1,
        "test_a.py::f[2]": 1,
        "test_a.py::g": 5,
        "test_ties.py::h": 9,
        "test_ties.py::i": 8,
    }
    own, other = ["test_ties.py::i", "test_ties.py::h"], ["test_a.py::f[1]", "test_a.py::g", "test_a.py::f[2]"]
    assert in_order(breadth, breadth, "merging/ties.py") == [other[0], *own, *other[1:]]
    assert in_order(breadth, breadth, "merging/dare.py") == [other[0], own[0], other[1], own[1], other[2]]


def test_every_subject_exists_and_belongs_to_a_part():
    found = files(ROOT)
    assert {part_of(path) for path in found} == {"modeling", "compression", "merging", "routing"}
    assert {"modeling/routing_twin_merging.py", "twin_merging_hf/merging/ties.py", "twin_merging_hf/low_rank.py"} <= {
        *found
    }
