"""What is measured, and how: points, implementations, floors, one record a case."""
