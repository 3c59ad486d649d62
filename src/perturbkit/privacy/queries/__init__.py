"""Answers to many questions: of an adaptive analyst about one sample, and after every step of a stream."""
