"""Tests of neglog.integrations, against the frameworks themselves."""
