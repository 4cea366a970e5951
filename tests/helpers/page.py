"""Report pages: what they hold, the windows they are opened in, and names that must stay text in them."""

import json
from html.parser import HTMLParser

VOID_TAGS = {"meta", "img", "input", "source", "br", "wbr", "link"}
WINDOWS = {"desktop": (1280, 900, False), "phone": (390, 844, True)}
HOSTILE = (
    "<script>document.title='run'</script>",
    '"><img src=x onerror="document.title=\'run\'">',
    "'; } </style></script><script>document.title='run'</script>",
    "{{ 7 * 7 }} {% raw %} &amp; <!-- ]]>",
    'two words, it\'s "quoted" \N{BICYCLE}\N{REGIONAL INDICATOR SYMBOL LETTER D}',
    "javascript:document.title='run'",
    "/very/long" * 300,
    "bytes \udcff that are no text",
    "http://127.0.0.1:9/picture.png",
)


class Page(HTMLParser):
    """A page's elements as (tag, sorted attribute names); its tables as {id: rows of cells}; its pictures."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.ids, self.tables, self.images, self.data = [], [], [], {}, [], []
        self.texts, self.words, self.changes = {}, "", []  # `words`: all text with single spaces
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, *sorted(attributes)))
        if tag not in VOID_TAGS:
            self.open.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "table":
            self.tables[attributes["id"]] = []
        elif tag == "tr":
            self._table().append([])
        elif tag in ("th", "td"):
            self._table()[-1].append("")
        elif tag == "data":
            self.changes.append(attributes["value"])
        elif tag == "img":
            self.images.append(attributes)
        self.data += [(key, value) for key, value in attributes.items() if key.startswith("data-")]

    def _table(self):
        return next(self.tables[a["id"]] for tag, a in reversed(self.open) if tag == "table")

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> where {self.open[-1:]} is open"
        _, attributes = self.open[-1]
        if tag in ("th", "td") and "data-value" in attributes:
            self._table()[-1][-1] = attributes["data-value"]
        self.open.pop()

    def handle_data(self, data):
        self.words += data
        for tag, attributes in self.open:
            if "id" in attributes or tag in ("title", "script", "style"):
                key = attributes.get("id", tag)
                self.texts[key] = self.texts.get(key, "") + data
        if any(tag in ("th", "td") for tag, _ in self.open):
            self._table()[-1][-1] += data

    def close(self):
        super().close()
        self.words = " ".join(self.words.split())
        assert not self.open, f"never closed: {self.open}"
        assert len(self.ids) == len(set(self.ids))

    def numbers(self, table, first=1):
        """{first cell: those from `first` as numbers or lists, None if empty} of a table's rows below the headings."""
        return {row[0]: [json.loads(text) if text else None for text in row[first:]] for row in self.tables[table][1:]}
