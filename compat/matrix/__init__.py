"""The parity matrix: run the environments of tox.ini, record what they found, write the tables.

    python -m compat.matrix             all environments; those that are missing here say so
    python -m compat.matrix ENV …       these only
    python -m compat.matrix --report    runs nothing, writes docs/compatibility.md
"""
