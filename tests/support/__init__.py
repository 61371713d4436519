"""What several test files share: real servers, started by the tests and stopped by process id."""
