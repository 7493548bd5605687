"""The preprocessing job: workers, ledger, writer."""
