"""The report of an audit: `dori.report.render.render` makes one HTML file, `dori.report.tables` the tables alone."""
