"""The frame around every page: where one is, where one can go, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html

from workbench import __version__
from workbench.apps.context import Page
from workbench.figures import DARK, LIGHT

# Ten shades around the accent, as the component library wants them.
_ACCENT = ("#e6f4f6", "#cfe7eb", "#a2d2da", "#72bcc8", "#4aa8b8", "#2a98ab", "#0b8299", "#0b6a7d", "#085a6b", "#044856")


# Of an address's wrong fields, so many are told.
_MOST_LINES = 6


def frame(pages: Sequence[Page]) -> Any:
    """Header, navigation and the place where pages go."""
    return dmc.MantineProvider(
        id="theme",
        theme={
            "primaryColor": "accent",
            "primaryShade": {"light": 7, "dark": 4},
            "colors": {"accent": list(_ACCENT)},
            "fontFamily": '"Segoe UI", Inter, Roboto, "Helvetica Neue", Arial, sans-serif',
            "defaultRadius": "sm",
        },
        forceColorScheme="light",
        children=[
            dcc.Location(id="url", refresh=False),
            dcc.Store(id="shown-query", data=""),
            dcc.Store(id="scheme", storage_type="local", data="light"),
            # Heads that a user has chosen, kept in that user's browser and in addresses.
            dcc.Store(id="head-set", storage_type="local", data=[]),
            dcc.Store(id="export-address", data=""),
            html.A("Skip to the page", href="#page", className="skip"),
            dmc.AppShell(
                [
                    dmc.AppShellHeader(_header(), px="md"),
                    dmc.AppShellNavbar(_navigation(pages), p="sm"),
                    dmc.AppShellMain(html.Main(id="page", tabIndex="-1")),
                ],
                header={"height": 52},
                navbar={"width": {"base": 120, "lg": 168}, "breakpoint": 0},
                padding="md",
            ),
            dmc.NotificationContainer(id="notifications", position="bottom-right"),
        ],
    )


def _header() -> Any:
    return dmc.Group(
        [
            dcc.Link(dmc.Text("Attention Workbench", fw=650, size="md"), href="/", className="brand"),
            dmc.Text(__version__, size="xs", c="dimmed"),
            dmc.Group(
                [
                    dmc.Text(id="set-size", size="sm", c="dimmed"),
                    # What a disabled button would tell is told by what is around it.
                    html.Span(
                        dmc.Button(
                            "Export HTML", id="export-page", size="compact-sm", variant="default", disabled=True
                        ),
                        id="export-about",
                    ),
                    html.Span(id="export-why", className="heard", role="status"),
                    dmc.Button(
                        "Dark", id="toggle-scheme", size="compact-sm", variant="default",
                        **{"aria-label": "Switch between light and dark"},
                    ),
                ],
                gap="xs",
                ml="auto",
            ),
        ],
        h="100%",
        gap="sm",
        wrap="nowrap",
    )  # fmt: skip


def _navigation(pages: Sequence[Page]) -> Any:
    links = [
        html.Li(dcc.Link(page.name, href=page.path, className="nav", id={"nav": page.path}, title=page.hint))
        for page in pages
    ]
    return html.Nav(html.Ul(links), **{"aria-label": "Pages"})


def refusal(words: str, advice: str = "", title: str = "This cannot be shown") -> Any:
    """What stands in the place of something that cannot be shown, with the next step."""
    text = [dmc.Text(words, size="sm")] + ([dmc.Code(advice, block=True, mt="xs")] if advice else [])
    return dmc.Alert(text, title=title, color="orange", variant="light", className="refusal")


def not_honoured(lines: Sequence[str]) -> Any:
    """What an address asks for and the page does not show, a line each."""
    told = [dmc.Text(line, size="sm") for line in lines[:_MOST_LINES]]
    more = len(lines) - _MOST_LINES
    told += [dmc.Text(f"{more} more.", size="sm")] if more > 0 else []
    title = "Not all of the address is shown"
    box = dmc.Alert(told, title=title, color="orange", variant="light", withCloseButton=True, mb="sm")
    return html.Div(box, id="not-honoured")


def colours() -> str:
    """The palettes as style variables, so that the style sheet and the figures share them."""
    lines = []
    for selector, palette in ((":root", LIGHT), ('[data-mantine-color-scheme="dark"]', DARK)):
        names = ("page", "surface", "sunken", "ink", "muted", "line", "accent", "effect", "control", "good", "bad")
        body = ";".join(f"--{name}:{getattr(palette, name)}" for name in names)
        # What a token looks at, and what looks at it.
        body += f";--back:{palette.series[0]};--forth:{palette.series[1]}"
        scale = ",".join(palette.sequential)
        lines.append(f"{selector}{{{body};--scale:linear-gradient(90deg,{scale})}}")
    return "".join(lines)
