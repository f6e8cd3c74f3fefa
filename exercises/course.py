"""How the course's tests compare numbers: with a message that says what is wrong."""

import numpy as np


def expect(found, wanted, message, tolerance=1e-5):
    """Fails with `message` where an array is not, to within tolerance, what it should be."""
    __tracebackhide__ = True
    found, wanted = np.asarray(found), np.asarray(wanted)
    if found.shape != wanted.shape:
        raise AssertionError(f"{message}\nfound the shape {found.shape}, wanted {wanted.shape}")
    if not np.allclose(found, wanted, rtol=tolerance, atol=tolerance):
        with np.printoptions(precision=5, suppress=True, threshold=40):
            raise AssertionError(f"{message}\nfound:  {found}\nwanted: {wanted}")
