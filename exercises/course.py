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


def both(result):
    """(loss, metrics) that a loss function has returned, or a failure that says so."""
    __tracebackhide__ = True
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise AssertionError("return (loss, metrics): one number, and a dict of numbers")
    return result
