"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class UserError(ValueError):
  """Bad input: a path, a flag, a file, a config value.

  The message is one line that names the value at fault. The command line prints it without a
  traceback and exits with status 2; library callers may catch it.
  """
