"""The benchmarks of the field, one file each: records -> probes, answers -> columns."""
