"""Benchmarks against stock psycopg, asyncpg and triopg; run ``python -m benchmarks``.

Not part of the wheel. ``README.md`` beside this file says how to read the figures.
"""
