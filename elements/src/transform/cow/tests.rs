mod crash;
mod hostile;
mod kit;
mod model;
mod races;
