//! A disk in a bucket, served by the graph that ships, from a server of the test that fails as it is told. Its objects
//! outlive the daemon.

use crate::{Site, read_log, run_logged};
use blockmason_tests::control::{Ended, command, ended};
use blockmason_tests::mason::{Mason, shipped_graph, until};
use mason_bucket::Server;

/// The disk.
pub(crate) const URL: &str = "s3://vms/vm1";

/// The line of the cache on the SSD as it ships, from its size on.
const SSD: &str = "(size 256M) (mode write_back)";

pub(crate) struct Cloud {
    pub(crate) site: Site,
    pub(crate) server: Server,
    /// What the graph file says now.
    graph: String,
}

impl Cloud {
    /// With a volume of that size, and keys where the daemon looks for them.
    pub(crate) fn new(size: &str) -> Cloud {
        let (site, server) = (Site::new(), Server::new());
        site.write("vm1.key", [7; 32]);
        std::fs::create_dir(site.path(".aws")).unwrap();
        let cloud = Cloud { site, server, graph: String::new() };
        cloud.keys(cloud.server.access(), cloud.server.secret());
        cloud.bucket("create", &["--size", size, "--block", "64k", "--make-bucket"]).done();
        cloud
    }

    pub(crate) fn keys(&self, access: &str, secret: &str) {
        let text = format!("[default]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n");
        self.site.write(".aws/credentials", text);
    }

    /// `mason bucket`.
    pub(crate) fn bucket(&self, verb: &str, more: &[&str]) -> Ended {
        let endpoint = self.server.endpoint();
        self.mason(&[&["bucket", verb, URL, "--endpoint", &endpoint], more].concat())
    }

    /// `mason` on a machine that has no role in any cloud, or does not get to know of it.
    pub(crate) fn mason(&self, args: &[&str]) -> Ended {
        let mut command = command(self.site.folder(), args);
        command.env("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1");
        ended(&command.output().unwrap())
    }

    /// The graph as it ships, from this server, with `ssd` instead of the size of the cache on the SSD.
    pub(crate) fn serve_with(&mut self, ssd: &str) {
        let text = std::fs::read_to_string(shipped_graph("cloud.mason")).unwrap();
        self.graph = replaced(&text, "http://127.0.0.1:9000)", &format!("{})", self.server.endpoint()));
        self.graph = replaced(&self.graph, SSD, &format!("(mode write_back) {ssd}"));
        self.site.write("cloud.mason", &self.graph);
    }

    /// Takes an element out of the graph file.
    pub(crate) fn without(&mut self, element: &str) {
        let lines = self.graph.lines().filter(|line| !line.starts_with(&format!("element {element} ")));
        let text = lines.map(|line| format!("{line}\n")).collect::<String>();
        self.graph = replaced(&text, &format!("-> {element} "), "");
        self.site.write("cloud.mason", &self.graph);
    }

    /// Changes the graph file.
    pub(crate) fn change(&mut self, from: &str, to: &str) {
        self.graph = replaced(&self.graph, from, to);
        self.site.write("cloud.mason", &self.graph);
    }

    pub(crate) fn has_ssd(&self) -> bool {
        self.graph.contains("element Ssd ")
    }

    pub(crate) fn run(&self) -> Mason {
        // A daemon that was killed leaves it behind.
        let _ = std::fs::remove_file(self.site.path("c.sock"));
        run_logged(&self.site, &["cloud.mason"])
    }

    pub(crate) fn get(&self, handler: &str) -> String {
        self.site.mason(&["get", handler]).done().trim().to_owned()
    }

    /// Everything is in the bucket.
    pub(crate) fn drain(&self) {
        self.site.mason(&["call", "Ssd.flush"]).done();
        until("all changes are in the bucket", || self.get("Ssd.dirty") == "0");
    }

    /// Nothing is missing in the bucket.
    pub(crate) fn check(&self, told: &str) {
        let ended = self.bucket("check", &[]);
        assert_eq!(ended.code, Some(0), "{told}: {}{}{}", ended.out, ended.err, read_log(&self.site));
    }
}

fn replaced(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "there is no {from} in {text}");
    text.replace(from, to)
}
