"""The report's page: its data (`data.page_data`), and the assets of the page.

`index.html` is the frame, `style.css` the style. `logic.js` has pure functions, `plots.js` the plots, `completions.js`
the browser for completions, `main.js` the rest. `uplot-*` is the unmodified plotting library with its license.
`grpo.telemetry.report` combines the assets into one file.
"""
