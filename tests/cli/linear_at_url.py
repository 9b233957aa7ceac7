"""As linear.py, with the packages for object storage imported beforehand."""

import gcsfs.core  # noqa: F401
import s3fs  # noqa: F401
from linear import prepare as prepare
