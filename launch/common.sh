# shellcheck shell=bash
# What the scripts beside this one share; they source it.

# fail MESSAGE: one line on stderr and exit code 2, as for all bad input.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# say MESSAGE: progress, on stderr.
say() {
  printf '%s\n' "$*" >&2
}

# value OPTION VALUE ...: the value of an option that needs one.
value() {
  if (($# < 2)) || [[ $2 == -- ]]; then fail "$1 needs a value"; fi
  printf '%s' "$2"
}

# number OPTION VALUE LEAST: checks a whole number.
number() {
  if [[ ! $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then
    fail "$1 is '$2', expected a whole number of $3 or more"
  fi
}

# name OPTION VALUE: checks a name that clouds and clusters accept.
name() {
  [[ $2 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "$1 is '$2', expected up to 40 lower-case letters, digits and dashes, beginning with a letter"
}

# command_words WORD ...: checks what stands after --.
command_words() {
  case ${1-} in
    train | evaluate) ;;
    *) fail "found '${1-}' after --, expected a command: ... -- train --config FILE --workdir DIR" ;;
  esac
}

# quoted WORD ...: the words as one line that a shell reads back.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# show WORD ...: prints a command as a shell reads it.
show() {
  printf '%s\n' "$(quoted "$@")"
}
