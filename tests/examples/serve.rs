//! Serves a graph given as text until its standard input ends: what a benchmark starts.
#![allow(clippy::unwrap_used)]

fn main() {
    let shards = std::env::args().nth(2).map_or(1, |n| n.parse().unwrap());
    let server = blockmason_tests::Server::new(shards);
    let (_disk, uris) = server.serve(&std::env::args().nth(1).unwrap()).unwrap();
    println!("{}", uris[0]);
    std::io::stdin().read_line(&mut String::new()).unwrap();
}
