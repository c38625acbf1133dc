//! Converts images to lazily loadable layers.
