"""The parity matrix: run the environments of tox.ini, record what they found, write the tables.

    python -m compat.matrix             what is missing here or not recorded yet is told, the rest run
    python -m compat.matrix ENV …       these environments only
    python -m compat.matrix --report    docs/compatibility.md from the recorded results, nothing run
"""
