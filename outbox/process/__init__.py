"""What every long-lived process needs: probes, an orderly stop, logs, metrics, patience, and failpoints for tests."""
