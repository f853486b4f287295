"""Looking into models: noise from layer to layer, attention heads, what they attend to, similar layers, layer weights."""
