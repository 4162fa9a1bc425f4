"""The real data sets the demo's tables come from, and how each is cut into series.

Only code stands here: the numbers are read, when needed, from packages that ship them.
``SOURCES.md`` beside this file lists the licence of each data set.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from insightv.demo.series import (
    MONTHS,
    QUARTERS,
    WEEKDAYS,
    YEARS,
    Reader,
    Series,
    by_month,
    decades,
    grid_both_ways,
    means,
    plotly,
    statsmodels,
    vega,
)

_REGIONS = {
    "north-africa": "Egypt Morocco Algeria Tunisia Libya",
    "south-of-sahara": "Nigeria Kenya Ethiopia Ghana Senegal",
    "north-america": "United_States Canada Mexico Cuba Guatemala",
    "south-america": "Brazil Argentina Chile Peru Colombia",
    "east-asia": "China Japan Korea,_Rep. Indonesia Vietnam",
    "west-asia": "India Pakistan Iran Turkey Saudi_Arabia",
    "west-europe": "France Germany United_Kingdom Spain Italy",
    "east-europe": "Poland Sweden Norway Hungary Romania",
}
_STATES = {
    "northeast": (
        "New York",
        "NY",
        "Pennsylvania",
        "PA",
        "Massachusetts",
        "MA",
        "New Jersey",
        "NJ",
    ),
    "south": ("Texas", "TX", "Florida", "FL", "Georgia", "GA", "Virginia", "VA"),
    "midwest": ("Illinois", "IL", "Ohio", "OH", "Michigan", "MI", "Wisconsin", "WI"),
    "west": ("California", "CA", "Washington", "WA", "Colorado", "CO", "Arizona", "AZ"),
}


def _gapminder() -> Iterator[Series]:
    frame = plotly("gapminder")
    metrics = (
        ("lifeExp", "Life expectancy", "years", 1),
        ("pop", "Population", "million people", 1e-6),
        ("gdpPercap", "GDP per person", "dollars", 1),
    )
    for region, names in _REGIONS.items():
        rows = frame[frame["country"].isin([name.replace("_", " ") for name in names.split()])]
        for column, title, unit, factor in metrics:
            grid: dict[str, dict[str, float]] = {}
            for code, year, value in zip(
                rows["iso_alpha"], rows["year"], rows[column], strict=True
            ):
                grid.setdefault(code, {})[str(year)] = value * factor
            yield from grid_both_ways(f"gapminder/{column}/{region}", grid, title, unit)


def _fertility() -> Iterator[Series]:
    codes = plotly("gapminder").drop_duplicates("country").set_index("country")["iso_alpha"]
    frame = statsmodels("fertility").set_index("Country Code")
    for region, names in _REGIONS.items():
        countries = [codes[name.replace("_", " ")] for name in names.split()]
        grid = {
            code: {
                str(year): float(frame.at[code, str(year)]) for year in YEARS if 1960 < year < 2009
            }
            for code in countries
        }
        yield from grid_both_ways(f"fertility/{region}", grid, "Births per woman", "births")


def _states() -> Iterator[Series]:
    crime = statsmodels("statecrime")
    airports = vega("airports")["state"].value_counts()
    metrics = {
        "hs_grad": "High-school graduates",
        "poverty": "People below the poverty line",
        "single": "Single-parent families",
        "urban": "People in cities",
    }
    for region, pairs in _STATES.items():
        states = dict(zip(pairs[::2], pairs[1::2], strict=True))
        for column, title in metrics.items():
            points = {code: float(crime.at[state, column]) for state, code in states.items()}
            group = f"states/{column}/{region}"
            yield Series(group, group, points, f"{title}, 2009", "%")
        group = f"states/airports/{region}"
        points = {code: float(airports[code]) for code in states.values()}
        yield Series(group, group, points, "Airports", "airports")


def _weather() -> Iterator[Series]:
    frame = vega("seattle_weather")
    frame["date"] = frame["date"].str.replace("/", "-")
    metrics = {
        "precipitation": ("Rain a day in Seattle", "mm"),
        "temp_max": ("Daily high in Seattle", "°C"),
        "temp_min": ("Daily low in Seattle", "°C"),
        "wind": ("Wind in Seattle", "m/s"),
    }
    for column, (title, unit) in metrics.items():
        for year, part in frame.groupby(frame["date"].str[:4]):
            group = f"weather/{column}/{year}"
            pairs = zip(part["date"], part[column], strict=True)
            for series in by_month(group, pairs, title, unit):
                yield Series(group, group, series.points, series.title, unit)
    for year, part in frame.groupby(frame["date"].str[:4]):
        grid: dict[str, dict[str, float]] = {}
        for date, kind in zip(part["date"], part["weather"], strict=True):
            months = grid.setdefault(kind[:6].capitalize(), {})
            month = MONTHS[int(date[5:7]) - 1]
            months[month] = months.get(month, 0.0) + 1
        yield from grid_both_ways(
            f"weather/kinds/{year}", grid, f"Days by weather in Seattle {year}", "days"
        )


def _temperatures() -> Iterator[Series]:
    for city in ("seattle", "sf"):
        hours = vega(f"{city}_temps")
        for hour, part in hours.groupby(hours["date"].str[11:13]):
            group, title = f"temps/{city}", f"Temperature at {hour}:00 in {city}"
            pairs = zip(part["date"], part["temp"], strict=True)
            for series in by_month(group, pairs, title, "°F"):
                yield Series(f"{series.name}/{hour}", group, series.points, series.title, "°F")


def _stocks() -> Iterator[Series]:
    stocks = vega("stocks")
    months = {name: f"{number:02d}" for number, name in enumerate(MONTHS, 1)}
    for symbol, part in stocks.groupby("symbol"):
        dates = [f"{text.split()[2]}-{months[text.split()[0]]}" for text in part["date"]]
        pairs = zip(dates, part["price"], strict=True)
        yield from by_month(f"stocks/{symbol}", pairs, f"Share price of {symbol}", "dollars")


def _jobs() -> Iterator[Series]:
    work = vega("us_employment")
    sectors = (
        "mining_and_logging construction durable_goods nondurable_goods wholesale_trade "
        "retail_trade transportation_and_warehousing utilities information "
        "financial_activities professional_and_business_services "
        "education_and_health_services leisure_and_hospitality other_services government"
    )
    for sector in sectors.split():
        pairs = zip(work["month"], work[sector], strict=True)
        title = f"US jobs, {sector.replace('_', ' ')}"
        yield from by_month(f"jobs/{sector}", pairs, title, "thousand jobs")


def _driving() -> Iterator[Series]:
    driving = vega("driving")
    for column, title, unit in (
        ("miles", "Miles driven per American", "miles"),
        ("gas", "Price of gasoline", "dollars"),
    ):
        points = {
            str(year): float(value)
            for year, value in zip(driving["year"], driving[column], strict=True)
            if year in YEARS
        }
        yield Series(f"driving/{column}", f"driving/{column}", points, title, unit)


def _iowa() -> Iterator[Series]:
    iowa = vega("iowa_electricity")
    grid: dict[str, dict[str, float]] = {}
    for date, kind, value in zip(iowa["year"], iowa["source"], iowa["net_generation"], strict=True):
        if int(date[:4]) in YEARS:
            grid.setdefault(kind[:6].strip(), {})[date[:4]] = float(value)
    yield from grid_both_ways("iowa", grid, "Electricity made in Iowa", "GWh")


def _crimea() -> Iterator[Series]:
    crimea = vega("crimea")
    for cause in ("wounds", "other", "disease"):
        pairs = zip(crimea["date"], crimea[cause].astype(float), strict=True)
        yield from by_month(f"crimea/{cause}", pairs, f"Crimean War, {cause}", "deaths")


def _barley() -> Iterator[Series]:
    frame = vega("barley")
    varieties = {"Manchuria": "Manchu", "Glabron": "Glabro", "Svansota": "Svanso"}
    varieties |= {"Velvet": "Velvet", "Trebi": "Trebi", "Peatland": "Peatla"}
    sites = {"University Farm": "UFarm", "Waseca": "Waseca", "Morris": "Morris"}
    sites |= {"Crookston": "Crooks", "Grand Rapids": "GrandR", "Duluth": "Duluth"}
    for year, part in frame[frame["variety"].isin(varieties)].groupby("year"):
        grid: dict[str, dict[str, float]] = {}
        for variety, site, crop in zip(part["variety"], part["site"], part["yield"], strict=True):
            grid.setdefault(varieties[variety], {})[sites[site]] = crop
        yield from grid_both_ways(f"barley/{year}", grid, f"Barley {year}", "bushels per acre")


def _cars() -> Iterator[Series]:
    frame = vega("cars")
    makers = {"ford": "Ford", "chevrolet": "Chevy", "plymouth": "Plymou", "amc": "AMC"}
    makers |= {"dodge": "Dodge", "toyota": "Toyota", "datsun": "Datsun", "volkswagen": "VW"}
    frame["maker"] = frame["Name"].str.split().str[0].map(makers)
    frame["year"] = frame["Year"].str[:4]
    metrics = {
        "Miles_per_Gallon": ("Miles per gallon", "miles"),
        "Displacement": ("Displacement", "cubic inches"),
        "Horsepower": ("Power", "hp"),
        "Weight_in_lbs": ("Weight", "lbs"),
        "Acceleration": ("Time from 0 to 60 mph", "seconds"),
    }
    for column, (title, unit) in metrics.items():
        group = f"cars/{column}"
        for by, part in (("maker", frame[frame["maker"].notna()]), ("Origin", frame)):
            for series in means(group, part, by, column, ["year"], title, unit):
                name = series.name.replace(group, f"{group}/{by}")
                yield Series(name, group, series.points, series.title, unit)
    for year, part in frame.groupby("year"):
        counts = part.groupby("maker", sort=False).size().astype(float)
        title = f"Models in the table, {year}"
        yield Series(f"cars/count/{year}", "cars/count", counts, title, "models")


def _ohlc() -> Iterator[Series]:
    weeks: dict[str, dict[str, dict[str, float]]] = {}
    for row in vega("ohlc").to_dict("records"):
        date = datetime.date.fromisoformat(row["date"])
        for column in ("open", "high", "low", "close"):
            week = weeks.setdefault(f"{date.isocalendar().week}", {})
            week.setdefault(column, {})[WEEKDAYS[date.weekday()]] = row[column]
    for number, columns in weeks.items():
        for column, points in columns.items():
            title = f"Volatility index at {column}, week {number} of 2009"
            yield Series(f"ohlc/{number}/{column}", "ohlc", points, title, "points")


def _tips() -> Iterator[Series]:
    days = plotly("tips").replace({"day": {"Thur": "Thu"}})
    days["share"] = 100 * days["tip"] / days["total_bill"]
    for column, title, unit in (
        ("total_bill", "Mean bill", "dollars"),
        ("tip", "Mean tip", "dollars"),
        ("share", "Mean tip share", "%"),
        ("size", "Mean party", "people"),
    ):
        within = ["sex", "smoker", "time"]
        yield from means(f"tips/{column}", days, "day", column, within, title, unit)


def _shares() -> Iterator[Series]:
    prices = plotly("stocks", indexed=False, datetimes=False)
    symbols = [column for column in prices.columns if column != "date"]
    for month, part in prices.groupby(prices["date"].str[:7]):
        group = f"shares/{month[:4]}-{'first' if month[5:] < '07' else 'second'}"
        points = {symbol: float(part[symbol].mean()) for symbol in symbols}
        title = f"Share price in {month}, January 2018 = 1"
        yield Series(f"shares/{month}", group, points, title, "times")


def _medals() -> Iterator[Series]:
    medals = plotly("medals_wide", indexed=False)
    codes = {"South Korea": "KOR", "China": "CHN", "Canada": "CAN"}
    grid = {
        codes[row["nation"]]: {kind.capitalize(): float(row[kind]) for kind in medals.columns[1:]}
        for row in medals.to_dict("records")
    }
    yield from grid_both_ways("medals", grid, "Short-track medals", "medals")


def _wind() -> Iterator[Series]:
    wind = plotly("wind")
    for strength, part in wind.groupby("strength"):
        ways = dict(zip(part["direction"], part["frequency"], strict=True))
        points = {way: ways[way] for way in ("N", "NE", "E", "SE", "S", "SW", "W", "NW")}
        group = f"wind/{strength}"
        yield Series(group, group, points, f"Wind of strength {strength}", "%")


def _election() -> Iterator[Series]:
    for row in plotly("election").to_dict("records"):
        points = {name[:6]: float(row[name]) for name in ("Coderre", "Bergeron", "Joly")}
        group = f"election/{str(row['district_id'])[0]}"  # neighbouring districts
        title = f"Votes in district {row['district_id']} of Montreal, 2013"
        yield Series(f"election/{row['district_id']}", group, points, title, "votes")


def _macro() -> Iterator[Series]:
    frame = statsmodels("macrodata")
    metrics = {
        "realgdp": ("US gross domestic product", "billion dollars"),
        "realcons": ("US consumption", "billion dollars"),
        "realinv": ("US investment", "billion dollars"),
        "realgovt": ("US government spending", "billion dollars"),
        "realdpi": ("US disposable income", "billion dollars"),
        "cpi": ("US price index", "points"),
        "m1": ("US money stock", "billion dollars"),
        "tbilrate": ("US treasury bill rate", "%"),
        "unemp": ("US unemployment", "%"),
        "pop": ("US population", "million people"),
    }
    for column, (title, unit) in metrics.items():
        group = f"macro/{column}"
        yearly = frame.groupby(frame["year"].astype(int))[column]
        points = {str(year): value for year, value in yearly.mean().items() if year in YEARS}
        yield Series(f"{group}/yearly", group, points, title, unit)
        for year, part in yearly:
            quarters = dict(zip(QUARTERS, part, strict=False))
            yield Series(f"{group}/{year}", group, quarters, f"{title}, {year}", unit)


def _elnino() -> Iterator[Series]:
    nino = statsmodels("elnino")
    for row in nino.to_dict("records"):
        year = int(row["YEAR"])
        points = {month: row[month.upper()] for month in MONTHS}
        title = f"Sea temperature off Peru, {year}"
        yield Series(f"elnino/{year}", f"elnino/{year // 5 * 5}", points, title, "°C")


def _co2() -> Iterator[Series]:
    dates = [(f"{date:%Y-%m}", v) for date, v in statsmodels("co2")["co2"].items() if v == v]
    for series in by_month("co2", dates, "Carbon dioxide on Mauna Loa", "ppm"):
        year = int(series.name[-4:])
        group = f"co2/{year // 5 * 5}"
        yield Series(series.name, group, series.points, series.title, series.unit)


def _sunspots() -> Iterator[Series]:
    spots = statsmodels("sunspots").set_index("YEAR")["SUNACTIVITY"]
    points = {str(year): spots[year] for year in YEARS if year in spots.index}
    yield Series("sunspots", "sunspots", points, "Sunspots", "spots")


def _travel() -> Iterator[Series]:
    modes = statsmodels("modechoice")
    modes["mode"] = modes["mode"].map({1: "Air", 2: "Train", 3: "Bus", 4: "Car"})
    modes["income"] = (modes["hinc"] // 10 * 10).astype(int)
    for column, title, unit in (
        ("ttme", "Time at the terminal", "minutes"),
        ("invc", "Cost of the ride", "dollars"),
        ("invt", "Time under way", "minutes"),
    ):
        yield from means(f"travel/{column}", modes, "mode", column, ["income"], title, unit)


def _voters() -> Iterator[Series]:
    voters = statsmodels("anes96").sort_values("age", kind="stable")
    voters["band"] = decades(voters["age"])
    voters = voters[voters["band"].isin(["20s", "30s", "40s", "50s", "60s", "70s"])]
    for column, title, unit in (
        ("TVnews", "Days a week with TV news", "days"),
        ("educ", "Education of voters", "level"),
        ("income", "Income of voters", "class"),
    ):
        yield from means(f"voters/{column}", voters, "band", column, ["PID", "vote"], title, unit)


def _flowers_and_wines() -> Iterator[Series]:
    from sklearn.datasets import load_iris, load_wine

    statistics = ("mean", "min", "max", "median")
    flowers = load_iris(as_frame=True).frame
    flowers["target"] = flowers["target"].map({0: "Setosa", 1: "Versic", 2: "Virgin"})
    wines = load_wine(as_frame=True).frame
    wines["target"] = "Wine" + (wines["target"] + 1).astype(str)
    for prefix, frame in (("iris", flowers), ("wine", wines)):
        for column in frame.columns[:-1]:
            unit = "cm" if prefix == "iris" else "units as measured"
            group, name = f"{prefix}/{column.replace('/', ' ')}", column.removesuffix(" (cm)")
            for statistic in statistics:
                points = frame.groupby("target")[column].agg(statistic)
                title = f"{name.replace('_', ' ').capitalize()}, {statistic}"
                yield Series(f"{group}/{statistic}", group, points, title, unit)


def _patients() -> Iterator[Series]:
    from sklearn.datasets import load_diabetes

    patients = load_diabetes(as_frame=True, scaled=False).frame.sort_values("age", kind="stable")
    patients["band"] = decades(patients["age"])
    patients = patients[patients["band"].isin(["20s", "30s", "40s", "50s", "60s", "70s"])]
    for column, title, unit in (
        ("bmi", "Body mass index", "kg/m²"),
        ("bp", "Blood pressure", "mmHg"),
        ("s1", "Cholesterol", "mg/dl"),
        ("s3", "HDL cholesterol", "mg/dl"),
        ("s6", "Blood sugar", "mg/dl"),
        ("target", "Progression of diabetes", "points"),
    ):
        yield from means(f"patients/{column}", patients, "band", column, ["sex"], title, unit)


_NOAA = "public domain (NOAA)"
_PUBLIC = "public domain"
_UNSTATED = "published facts; the package (MIT) states no further terms"
READERS = (
    Reader(_gapminder, "plotly gapminder", "CC BY 4.0 (Gapminder Foundation)"),
    Reader(_fertility, "statsmodels fertility", "World Bank terms of use (CC BY 4.0)"),
    Reader(_states, "statsmodels statecrime, vega_datasets airports", _PUBLIC),
    Reader(_weather, "vega_datasets seattle-weather", _NOAA),
    Reader(_temperatures, "vega_datasets seattle-temps, sf-temps", _NOAA),
    Reader(_stocks, "vega_datasets stocks", _UNSTATED),
    Reader(_jobs, "vega_datasets us-employment", "public domain (US Bureau of Labor Statistics)"),
    Reader(_driving, "vega_datasets driving", _UNSTATED),
    Reader(_iowa, "vega_datasets iowa-electricity", "public domain (US EIA)"),
    Reader(_crimea, "vega_datasets crimea", "public domain (published 1858)"),
    Reader(_barley, "vega_datasets barley", _UNSTATED),
    Reader(_cars, "vega_datasets cars", _UNSTATED),
    Reader(_ohlc, "vega_datasets ohlc", _UNSTATED),
    Reader(_tips, "plotly tips", _UNSTATED),
    Reader(_shares, "plotly stocks", _UNSTATED),
    Reader(_medals, "plotly medals", _UNSTATED),
    Reader(_wind, "plotly wind", _UNSTATED),
    Reader(_election, "plotly election", "published facts (City of Montreal open data)"),
    Reader(_macro, "statsmodels macrodata", _PUBLIC),
    Reader(_elnino, "statsmodels elnino", _PUBLIC),
    Reader(_co2, "statsmodels co2", _PUBLIC),
    Reader(_sunspots, "statsmodels sunspots", _PUBLIC),
    Reader(_travel, "statsmodels modechoice", _PUBLIC),
    Reader(_voters, "statsmodels anes96", _PUBLIC),
    Reader(_flowers_and_wines, "scikit-learn iris, wine", "CC BY 4.0 (UCI repository)"),
    Reader(_patients, "scikit-learn diabetes", _UNSTATED),
)
"""Every source, in a fixed order."""
