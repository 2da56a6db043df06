"""python -m qaperso.chat --workdir DIR --querier NAME [NAME ...] [--once TEXT]

Talks to a run as somebody it knows, or as "stranger"; replies appear as they are written. With several queriers each text is
answered to all of them at once, on a terminal side by side, elsewhere one after the other. Lines may also come from a pipe.
Commands:

    /as NAME          go on as somebody else, from the beginning
    /compare [TEXT]   what several queriers are told when they ask this, or else what was asked last
    /history          what was said
    /clear            begin anew
    /help  /quit      this; leave (Ctrl-D does too). Ctrl-C stops a reply
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qaperso import reply, writers
from qaperso.batching import Model, prepare
from qaperso.data.formats.common import as_text
from qaperso.data.store import STRANGER_NAME
from qaperso.errors import UserError, command, nearest
from qaperso.generate import Sampling
from qaperso.mesh import start_runtime
from qaperso.run import Run, open_run, restore
from qaperso.types import Turn

# Others who are compared with whoever talks, where no others are named.
OTHERS = 3
# Characters that a reply beside others takes at least.
COLUMN = 26


def open_model(workdir: Path) -> Model:
    """A trained run's best checkpoint, ready to reply, with whoever was enrolled.

    Args:
      workdir: its folder, or the Hub name of one that was exported.

    Raises:
      UserError: no run there, or one that cannot be opened.
    """
    return ready(open_run(workdir))


def ready(run: Run) -> Model:
    """An opened run's best checkpoint, ready to reply.

    Raises:
      UserError: it cannot be restored.
    """
    trainable = restore(run)[0]
    writers.ready(run, trainable)
    return prepare(run, trainable)


def responder_of(run: Run, name: str | None = None) -> str:
    """Who answers: the run's only responder, or the one of that name.

    Raises:
      UserError: the run has several and none was named, or nobody of that name.
    """
    names = run.registry.responders
    if name is None and len(names) > 1:
        raise UserError(f"the run has {len(names)} responders; choose one with --responder{nearest('', names)}")
    if name is not None and name not in names:
        raise UserError(f"responder '{name}' is not known to this run{nearest(name, names)}")
    return name or names[0]


def answer_one(model: Model, history: list[Turn], querier: str, text: str, responder: str, how: Sampling) -> None:
    """Streams one reply to the terminal and adds query and reply to the history; Ctrl-C ends the reply where it is.

    A reply that was stopped before its first word leaves the history as it was.
    """
    run, pieces, stopped = model.run, [], False
    asked = reply.question(run, history, querier, text, responder)
    try:
        for piece in reply.stream(model, asked, run.registry.row(querier), how):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
    print(" [stopped]" if stopped else "")
    if pieces or not stopped:
        history += [Turn(querier, text), Turn(responder, "".join(pieces))]


def answer_all(model: Model, queriers: Sequence[str], text: str, responder: str, how: Sampling) -> None:
    """One query of several: on a terminal side by side as the replies are written, elsewhere one after the other."""
    console, run = Console(), model.run
    if not console.is_terminal:
        found = reply.answers(model, text, queriers, responder, how)
        width = max(map(len, queriers))
        for querier, said in found.items():
            # Lines of one reply stand under each other, so that the next name is not lost among them.
            print(f"{querier:<{width}}  " + said.replace("\n", "\n" + " " * (width + 2)))
        return
    asked = [reply.question(run, [], q, text, responder) for q in queriers]
    rows = [run.registry.row(q) for q in queriers]
    said = [""] * len(asked)
    console.print(Text(f"{text}  ({responder} replies)", style="bold"))
    with Live(side_by_side(queriers, said, console.width), console=console, auto_refresh=False) as live:
        for i, piece in reply.streams(model, asked, rows, [how] * len(asked)):
            said[i] += piece
            live.update(side_by_side(queriers, said, console.width), refresh=True)


def side_by_side(queriers: Sequence[str], said: Sequence[str], width: int) -> Table:
    """Replies in columns as wide as each other, as many beside each other as a terminal has room for.

    Args:
      queriers: who is told.
      said: what, so far.
      width: of the terminal, in characters.
    """
    across = min(len(queriers), max(1, width // COLUMN))
    table = Table.grid(expand=True, padding=(0, 1))
    for _ in range(across):
        table.add_column(ratio=1)
    # Text, since what people say may look like markup.
    panels = [Panel(Text(t), title=Text(q), title_align="left") for q, t in zip(queriers, said, strict=True)]
    for start in range(0, len(panels), across):
        table.add_row(*panels[start : start + across])
    return table


@dataclasses.dataclass
class Session:
    """One conversation, which commands change.

    Attributes:
      model: that replies.
      responder: as whom.
      queriers: who talks; several are answered side by side, and nothing is remembered.
      how: replies are drawn.
      history: what was said.
      last: what was asked last.
    """

    model: Model
    responder: str
    queriers: tuple[str, ...]
    how: Sampling
    history: list[Turn] = dataclasses.field(default_factory=list)
    last: str = ""

    def take(self, line: str) -> bool:
        """Does what a line says; False where it says to leave.

        Raises:
          UserError: no such command or querier, or a query that fits no row.
        """
        line = as_text(line, "query")
        word, _, rest = line.partition(" ")
        if not word.startswith("/"):
            self.ask(line)
            return True
        commands: dict[str, Callable[[str], None]] = {
            "/as": self.become,
            "/compare": self.compare,
            "/history": self.show,
            "/clear": self.clear,
            "/help": lambda _: print(__doc__.partition("Commands:\n\n")[2].rstrip()),
        }
        if word in ("/quit", "/exit"):
            return False
        if word not in commands:
            raise UserError(f"'{word}' is no command{nearest(word, [*commands, '/quit'])}")
        commands[word](rest.strip())
        return True

    def ask(self, text: str) -> None:
        """Puts a query, as whoever talks."""
        if not text:
            return
        self.last = text
        if len(self.queriers) > 1:
            self.compare(text)
        else:
            answer_one(self.model, self.history, self.queriers[0], text, self.responder, self.how)

    def become(self, name: str) -> None:
        """Goes on as somebody else; what another one said is not theirs to go on from."""
        if not name:
            known = ", ".join([*self.model.run.registry.known, STRANGER_NAME])
            raise UserError(f"/as needs a name; known are {known}")
        self.model.run.registry.row(name)
        self.queriers = (name,)
        self.clear("")

    def compare(self, text: str) -> None:
        """Puts a query, or the last one, as several queriers: those who talk, or whoever talks, others and the stranger."""
        text = text or self.last
        if not text:
            raise UserError("/compare has nothing to compare yet; write /compare TEXT")
        self.last = text
        queriers = self.queriers
        if len(queriers) == 1:
            others = [name for name in self.model.run.registry.known if name not in queriers][:OTHERS]
            queriers = tuple(dict.fromkeys((*queriers, *others, STRANGER_NAME)))
        try:
            answer_all(self.model, queriers, text, self.responder, self.how)
        except KeyboardInterrupt:
            print("[stopped]")

    def show(self, _: str) -> None:
        """Prints what was said."""
        print("\n".join(f"{turn.speaker}: {turn.text}" for turn in self.history) or "nothing was said yet")

    def clear(self, _: str) -> None:
        """Begins anew."""
        self.history.clear()

    def talk(self, lines: Iterator[str], patient: bool) -> None:
        """Takes lines until there are no more.

        Args:
          lines: of a terminal or a pipe.
          patient: whether a mistake is told and the next line taken, as a person at a terminal would have it.

        Raises:
          UserError: a mistake, where it is not told.
        """
        for line in lines:
            try:
                if not self.take(line):
                    return
            except UserError as error:
                if not patient:
                    raise
                print(f"error: {error}", file=sys.stderr)


def typed(session: Session) -> Iterator[str]:
    """Lines that somebody types, each after a prompt that names who talks; Ctrl-C drops the line."""
    while True:
        try:
            yield input(f"{' '.join(session.queriers)}> ")
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves")
        except EOFError:
            print()
            return


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qaperso.chat",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--querier", required=True, nargs="+", metavar="NAME", help='"stranger" = nobody it knows')
    parser.add_argument("--responder", metavar="NAME", help="needed where the run has several")
    parser.add_argument("--once", metavar="TEXT", help="ask this and leave")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    known = parser.parse_args(arguments)
    _check_sampling(known)
    start_runtime(alone=True)
    run = open_run(Path(known.workdir))
    queriers = tuple(dict.fromkeys(as_text(name, "--querier") for name in known.querier))
    for querier in queriers:
        run.registry.row(querier)
    responder = responder_of(run, known.responder)
    once = None if known.once is None else as_text(known.once, "--once")
    if once == "":
        raise UserError("--once is empty; give the text of a query")
    model = ready(run)
    g = run.config.generate
    how = Sampling(
        known.max_new_tokens or g.max_new_tokens,
        g.temperature if known.temperature is None else known.temperature,
        g.top_p if known.top_p is None else known.top_p,
        known.seed,
    )
    # From here on there is `model.run`, without the base, whose memory is free again.
    del run
    session = Session(model, responder, queriers, how)
    if once is not None:
        session.ask(once)
    elif sys.stdin.isatty():
        session.talk(typed(session), patient=True)
    else:
        session.talk(_piped(), patient=False)
    return 0


def _piped() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x}"
        raise UserError(f"standard input: found {found}, expected UTF-8; convert what is piped in") from error


def _check_sampling(known: argparse.Namespace) -> None:
    if known.temperature is not None and not known.temperature >= 0:
        raise UserError(f"--temperature is {known.temperature}, expected 0 (greedy) or more")
    if known.top_p is not None and not 0 < known.top_p <= 1:
        raise UserError(f"--top-p is {known.top_p}, expected more than 0, at most 1")
    if known.max_new_tokens is not None and known.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {known.max_new_tokens}, expected 1 or more")


if __name__ == "__main__":
    sys.exit(main())
