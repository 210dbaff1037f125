"""What is made of result files: tables, goals, pictures, README's sections. Measures nothing."""
