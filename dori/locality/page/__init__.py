"""The page of a locality run: `dori.locality.page.render.render` makes one HTML file from the records alone."""
