//go:build linux

package interop_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// root is the top of this module, seen from where its tests run.
const root = "../.."

// programs names, inside, the folder with hallmark, hallmarkd and demo.
const programs = "INTEROP_PROGRAMS"

// TestMain runs the tests a second time, as the first process of new network and
// process namespaces. The service, the registries and cosign all live in there:
// nothing else can be reached, and nothing outlives the tests.
func TestMain(m *testing.M) {
	if os.Getenv(programs) == "" {
		os.Exit(outside())
	}
	if err := raiseLoopback(); err != nil {
		fmt.Fprintln(os.Stderr, "raising the loopback interface:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// outside does what needs the network, builds, and runs the tests inside.
func outside() int {
	// The kernel ends the child when this thread ends.
	runtime.LockOSThread()
	dir, err := os.MkdirTemp("", "interop-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := build(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	err = enter(dir)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "running the tests without a network:", err)
		return 1
	}
	return 0
}

// build makes the programs that the tests run, with the flags of the Makefile so
// that both share their compiled packages.
func build(dir string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", dir, "./cmd/hallmark", "./cmd/hallmarkd", "./internal/demo")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building the programs: %w\n%s", err, out)
	}
	return nil
}

// enter runs this test binary in namespaces of its own. Root may make them;
// others, and root in a container, must first be root of a user namespace.
func enter(dir string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	const cut = syscall.CLONE_NEWNET | syscall.CLONE_NEWPID
	err = syscall.EPERM
	if os.Geteuid() == 0 {
		err = run(self, dir, &syscall.SysProcAttr{Cloneflags: cut})
	}
	if errors.Is(err, syscall.EPERM) {
		err = run(self, dir, &syscall.SysProcAttr{
			Cloneflags:  cut | syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		})
	}
	return err
}

func run(self, dir string, attr *syscall.SysProcAttr) error {
	attr.Pdeathsig = syscall.SIGKILL
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), programs+"="+dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = attr
	return cmd.Run()
}

// raiseLoopback brings up the one interface of a new network namespace.
func raiseLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
}

// Every other test relies on this: what verifies here verifies offline.
func TestNetworkIsCut(t *testing.T) {
	interfaces, err := net.Interfaces()
	if err != nil || len(interfaces) != 1 || interfaces[0].Flags&net.FlagLoopback == 0 {
		t.Errorf("interfaces %v, %v", interfaces, err)
	}
	for _, addr := range []string{"1.1.1.1:443", "8.8.8.8:53", "[2606:4700:4700::1111]:443"} {
		start := time.Now()
		conn, err := net.DialTimeout("tcp", addr, 10*time.Second)
		if err == nil {
			conn.Close()
			t.Fatalf("%s was reached", addr)
		}
		if !errors.Is(err, syscall.ENETUNREACH) && !errors.Is(err, syscall.EADDRNOTAVAIL) {
			t.Errorf("dialing %s failed after %s with %v, not because there is no way to it", addr, time.Since(start), err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.DialTimeout("tcp", l.Addr().String(), 10*time.Second)
	if err != nil {
		t.Fatalf("loopback does not work: %v", err)
	}
	conn.Close()
	if pid := os.Getpid(); pid != 1 {
		t.Errorf("process %d, not the first of its namespace", pid)
	}
}

// program returns the absolute path of a program that was built for these tests.
// It looks at every source of the module, so that the go command knows on what a
// remembered result of the test depends.
func program(t testing.TB, name string) string {
	t.Helper()
	check(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && d.Name() != ".." && d.Name()[0] == '.' {
			return fs.SkipDir
		}
		if filepath.Ext(path) == ".go" {
			_, err = os.Stat(path)
		}
		return err
	}))
	return filepath.Join(os.Getenv(programs), name)
}
