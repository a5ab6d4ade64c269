import pickle

import pytest

from kernels.errors import CollapsedError, InputError, NotFiniteError, ScfError, StepCapError


@pytest.mark.parametrize("kind", [ScfError, StepCapError])
def test_history_of_rungs_survives_the_way_between_processes(kind: type[ScfError]) -> None:
    error = kind("no luck", history=("one", "two"))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "no luck"
    assert copy.history == ("one", "two")
    assert copy.status == "convergence"


def test_other_errors_survive_it_too() -> None:
    for error in (InputError("a"), CollapsedError("b")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.status) == (type(error), str(error), error.status)
    assert issubclass(CollapsedError, NotFiniteError)
