"""What the operator, decoding and training cost on this machine, beside what it could do at best.

Each of `operator`, `decode` and `train` has `measure(...) -> dict`: hardware, versions, rows and targets, for JSON.
Contenders are timed in the same interleaved rounds as the machine's own rates; medians are kept.
"""
