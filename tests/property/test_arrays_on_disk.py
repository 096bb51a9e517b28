"""Arrays written as safetensors come back as they were, whatever their memory layout."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from recollect.io import write_arrays


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), layout=st.sampled_from(["C", "F", "step", "reversed"]))
def test_views_with_strides_are_read_back_unchanged(tmp_path_factory, rows, columns, layout):
    whole = np.arange(4 * rows * columns, dtype=np.float32).reshape(2 * rows, 2 * columns)
    array = {"C": whole, "F": np.asfortranarray(whole), "step": whole[::2, 1::2], "reversed": whole[::-1]}[layout]
    path = tmp_path_factory.mktemp("arrays") / "a.safetensors"
    write_arrays(path, {"a": array}, {"note": "x"})
    np.testing.assert_array_equal(load_file(path)["a"], array)
