"""The report's page: its data (`data.page_data`), and beside it the files that the page is made of.

`index.html` is the frame, `style.css` the looks. `logic.js` has pure functions, `plots.js` the plots, `completions.js`
the browser for completions, `main.js` the rest. `uplot-*` is the plotting library as its authors publish it, with its
license. `grpo.telemetry.report` puts them together into one file.
"""
