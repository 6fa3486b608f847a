"""The verbs of the command line, one file a family. What a verb needs is imported when it runs."""
