"""What is measured: pgebus, loops without a library, other libraries. Each file is a program of its own."""
