"""Tests, and the fuzzers that they share their cases with."""
