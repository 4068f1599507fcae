"""What is measured, one module per library.

Each module has a ``WORKLOADS`` table: name of the workload to a function that takes
`Options` and returns an async context manager, which yields a batch function
(`benchmarks._batch.Batch`). Everything outside the batch function is set-up.
"""
