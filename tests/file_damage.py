"""Damages files of weights, for tests that each is refused or read."""

import hypothesis
import hypothesis.strategies as st

from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import torch_file


@st.composite
def mutated(draw, original):
    """The original with bytes flipped, set, cut out or put in, or its end missing."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.integers(0, 4))
        kind = draw(st.sampled_from(["bit", "bytes", "cut", "insert", "truncate"]))
        if kind == "bit" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "bytes":
            content[place : place + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "cut":
            del content[place : place + length]
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=8))
        else:
            del content[place:]
    return bytes(content)


def read_damaged(path):
    """The arrays, each looked at to its last byte, or None after a clear refusal."""
    try:
        arrays = torch_file.read(path)
    except UserError as error:
        if str(path) not in str(error):
            raise AssertionError("the error does not name the file") from error
        return None
    for name, array in arrays.items():
        assert isinstance(name, str)
        array.tobytes()
    return arrays


settings = hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
