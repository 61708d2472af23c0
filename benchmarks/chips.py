"""Memory bandwidth of Apple's chips, in GB/s, as Apple publishes it: 10^9 bytes a second.

Two chips are sold with two bandwidths: there the number of processor cores tells which.
"""

BANDWIDTHS = {
    "M1": 68.25,
    "M1 Pro": 200.0,
    "M1 Max": 400.0,
    "M1 Ultra": 800.0,
    "M2": 100.0,
    "M2 Pro": 200.0,
    "M2 Max": 400.0,
    "M2 Ultra": 800.0,
    "M3": 100.0,
    "M3 Pro": 150.0,
    "M3 Max": {14: 300.0, 16: 400.0},
    "M3 Ultra": 819.0,
    "M4": 120.0,
    "M4 Pro": 273.0,
    "M4 Max": {14: 410.0, 16: 546.0},
    "M5": 153.0,
}
# For which a time is predicted, whatever the chip at hand; the larger M4 Max.
PREDICTED = {"M1": 68.25, "M2_Max": 400.0, "M3_Ultra": 819.0, "M4_Max": 546.0}


def bandwidth(name: str, cores: int) -> float | None:
    """Published bandwidth of a chip, in GB/s, or None where this file does not know it.

    Args:
        name: As the system calls it: "Apple M4 Max".
        cores: Cores of its processor.
    """
    found = BANDWIDTHS.get(name.removeprefix("Apple ").strip())
    return found.get(cores) if isinstance(found, dict) else found


def predicted_seconds(nbytes: float, gigabytes_a_second: float) -> float:
    """The time in which memory moves that much: what a kernel cannot beat."""
    return nbytes / gigabytes_a_second / 1e9
