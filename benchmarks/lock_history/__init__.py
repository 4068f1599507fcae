"""A history checker for locks: real processes, a real server, and a nemesis that breaks things.

``python -m benchmarks.lock_history --seconds 60 --seed 7``
"""
