"""The judges of races say what they have compared, as tests do."""

import pytest

pytest.register_assert_rewrite("tests.interleavings.scene", "tests.interleavings.spec", "tests.interleavings.specs")
