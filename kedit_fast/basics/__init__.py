"""What everything stands on: checks of arguments, words, files, progress, the caller's state. Free of models."""
