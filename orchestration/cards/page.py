"""The HTML of a card, for Jinja."""

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ facts.name }}: model card</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent);
  --faint: color-mix(in srgb, currentColor 62%, transparent);
  --tint: color-mix(in srgb, currentColor 5%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: .7rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; }
.lead { font-size: 1.05rem; color: var(--faint); }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.pairs td:first-child { color: var(--faint); white-space: nowrap; width: 11rem; }
td { overflow-wrap: anywhere; }
.wide td { min-width: 7rem; }
ul { padding-left: 1.2rem; margin: .5rem 0; }
li { margin: .2rem 0; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption, .note { color: var(--faint); font-size: .85rem; margin-top: .25rem; overflow-wrap: anywhere; }
pre { background: var(--tint); padding: .7rem .9rem; border-radius: 6px; margin: 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
code { font-size: .92em; }
</style>
<main>
<h1>{{ facts.name }}</h1>
<p class="lead">{{ headline }}</p>
{% if facts.about %}
<p>{{ facts.about }}</p>
{% endif %}
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% for text in section.text %}
<p>{{ text | code }}</p>
{% endfor %}
{% for table in section.tables %}
<div class="scroll"><table class="{{ 'wide' if table.head[0] else 'pairs' }}">
{% if table.head[0] %}
<tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% endif %}
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell | code }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% if section["items"] %}
<ul>
{% for item in section["items"] %}
<li>{{ item | code }}</li>
{% endfor %}
</ul>
{% endif %}
{% for quote in section.quotes %}
<figure><pre>{{ quote.text }}</pre><figcaption>{{ quote.note }}</figcaption></figure>
{% endfor %}
{% for picture in section.pictures %}
<figure><img src="data:image/png;base64,{{ picture.png | inline }}" alt="{{ picture.title }}">
<figcaption>{{ picture.title }}</figcaption></figure>
{% endfor %}
{% if not (section.text or section.tables or section["items"] or section.quotes or section.pictures) %}
<p>Nothing.</p>
{% endif %}
</section>
{% endfor %}
</main>
</html>
"""
