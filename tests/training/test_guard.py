"""The guard against values that are not finite."""

import numpy as np
import pytest

from aurora_jax.training import guard


def test_the_error_names_the_metric():
  guard.check_metrics(4, {"a": np.float32(1), "v": np.arange(3)})
  with pytest.raises(guard.NonFinite, match="v is inf at step 4"):
    guard.check_metrics(4, {"a": np.float32(1), "v": np.array([1, np.inf, np.nan])})
  with pytest.raises(guard.NonFinite, match="a is nan at step 5"):
    guard.check_metrics(5, {"v": np.array([np.inf]), "a": np.float32(np.nan)})
