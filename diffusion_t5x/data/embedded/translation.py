"""Parallel text from CLDR in any two locales: dates, durations, amounts, units and names."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal

from babel import Locale, UnknownLocaleError, dates, lists, numbers, units

NUM_DRAWS = 90_000
SEED = 20_240_131

CURRENCIES = (
    "USD", "EUR", "GBP", "CHF", "JPY", "CNY", "INR", "BRL", "CAD", "AUD", "SEK", "NOK", "DKK",
    "PLN", "CZK", "HUF", "TRY", "ZAR", "MXN", "KRW",
)  # fmt: skip
UNITS = (
    "length-kilometer", "length-meter", "length-centimeter", "length-mile", "length-foot",
    "mass-kilogram", "mass-gram", "mass-pound", "mass-ounce", "volume-liter", "volume-milliliter",
    "temperature-celsius", "temperature-fahrenheit", "speed-kilometer-per-hour",
    "speed-mile-per-hour", "digital-megabyte", "digital-gigabyte", "power-watt", "power-kilowatt",
    "area-hectare", "area-square-meter", "energy-calorie", "electric-volt", "duration-hour",
    "duration-week",
)  # fmt: skip
LANGUAGES = (
    "de", "en", "es", "fr", "it", "pt", "nl", "sv", "da", "pl", "cs", "hu", "tr", "ru", "uk", "el",
    "ar", "he", "hi", "ja", "ko", "zh", "vi", "th",
)  # fmt: skip
TERRITORIES = (
    "DE", "US", "ES", "FR", "IT", "PT", "NL", "SE", "DK", "PL", "CZ", "HU", "TR", "UA", "GR",
    "EG", "IL", "IN", "JP", "KR", "CN", "VN", "TH", "BR", "CA", "MX", "AR", "CL", "NO", "FI",
)  # fmt: skip

Render = Callable[..., str]  # called with `locale` alone


def _date(rng: random.Random) -> Render:
    day = datetime.date(1990, 1, 1) + datetime.timedelta(days=rng.randrange(18_000))
    return partial(dates.format_date, day, rng.choice(("full", "long", "medium", "short")))


def _date_and_time(rng: random.Random) -> Render:
    moment = datetime.datetime(2000, 1, 1) + datetime.timedelta(minutes=rng.randrange(20_000_000))
    return partial(dates.format_datetime, moment, "medium")


def _time(rng: random.Random) -> Render:
    clock = datetime.time(rng.randrange(24), rng.randrange(60), rng.randrange(60))
    return partial(dates.format_time, clock, rng.choice(("short", "medium")))


def _duration(rng: random.Random) -> Render:
    unit, most = rng.choice(
        (("seconds", 59), ("minutes", 59), ("hours", 23), ("days", 6), ("weeks", 4))
    )
    delta = datetime.timedelta(**{unit: rng.randint(1, most) * rng.choice((1, -1))})
    return partial(dates.format_timedelta, delta, threshold=1, add_direction=rng.random() < 0.7)


def _amount(rng: random.Random) -> Render:
    value = rng.choice((rng.randint(1, 999), rng.randint(1, 99_999) / 100, rng.randint(1, 9_999)))
    return partial(numbers.format_currency, value, rng.choice(CURRENCIES), format_type="name")


def _unit(rng: random.Random) -> Render:
    value = rng.choice((rng.randint(1, 999), rng.randint(1, 999) / 10))
    return partial(units.format_unit, value, rng.choice(UNITS), length="long")


def _number(rng: random.Random) -> Render:
    value = rng.randint(1, 10 ** rng.randint(4, 7))
    if rng.random() < 0.3:
        return partial(numbers.format_percent, value % 1000 / 1000, "0.0%")
    if rng.random() < 0.3:
        return partial(numbers.format_compact_decimal, value, format_type="long", fraction_digits=1)
    return partial(numbers.format_decimal, value / 10)


def _names(rng: random.Random) -> Render:
    style: Literal["standard", "or"] = rng.choice(("standard", "or"))
    known, kind = (LANGUAGES, "languages") if rng.random() < 0.5 else (TERRITORIES, "territories")
    codes = rng.sample(known, 2)
    return lambda locale: lists.format_list(
        [getattr(locale, kind)[code] for code in codes], style, locale=locale
    )


# The kinds of texts, and how often each is drawn.
_KINDS: Mapping[Callable[[random.Random], Render], int] = {
    _date: 5,
    _date_and_time: 3,
    _time: 1,
    _duration: 1,
    _amount: 5,
    _unit: 4,
    _number: 3,
    _names: 3,
}


def parse_locale(name: str) -> Locale:
    """Returns the CLDR locale of a name.

    Raises:
      ValueError: if CLDR has no such locale.
    """
    try:
        return Locale.parse(name)
    except (UnknownLocaleError, ValueError) as error:
        raise ValueError(f"locale {name!r} is not in CLDR; expected one such as 'fr'.") from error


def generate(source_locale: str, target_locale: str) -> Iterator[dict[str, str]]:
    """Yields pairs of texts `{'source', 'target'}`, each source once, in two locales of CLDR.

    Sources with more than one translation are left out.

    Raises:
      ValueError: if a locale is unknown.
    """
    source, target = parse_locale(source_locale), parse_locale(target_locale)
    rng = random.Random(SEED)
    pairs: dict[str, str | None] = {}
    for maker in rng.choices(list(_KINDS), list(_KINDS.values()), k=NUM_DRAWS):
        render = maker(rng)
        text, translation = render(locale=source), render(locale=target)
        known = pairs.setdefault(text, translation)
        if known != translation:
            pairs[text] = None
    for text, unique in pairs.items():
        if unique is not None:
            yield {"source": text, "target": unique}
