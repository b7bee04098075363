"""What is measured: a file a suite, its cases as data and one function that measures a case."""
