// The bookkeeping of devices and streams that torch asks of a CUDA driver, without one.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

static thread_local c10::DeviceIndex current_index = 0;
static c10::DeviceIndex device_count = 1;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device getDevice() const override { return {type(), current_index}; }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_index = device.index(); }
  void setDevice(c10::Device device) const override {
    if (device.index() >= device_count) throw std::runtime_error("CUDA error: invalid device ordinal");
    current_index = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count; }
};

// Autograd asks whether a device is in use, which torch asks of the driver. Its hooks are one object that it keeps, and
// whose class is not exported: the object gets a copy of its table of virtual functions with this one in it.
static bool has_primary_context(const at::CUDAHooksInterface*, c10::DeviceIndex) { return false; }

static void replace_hook() {
  static void* copy[200];
  auto& table = *reinterpret_cast<void***>(const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks()));
  if (table == copy + 2) return;
  std::copy(table - 2, table + 198, copy);
  auto function = &at::CUDAHooksInterface::hasPrimaryContext;
  std::size_t offset;
  std::memcpy(&offset, &function, sizeof offset);
  copy[2 + offset / sizeof(void*)] = reinterpret_cast<void*>(has_primary_context);
  table = copy + 2;
}

extern "C" void install(int count) {
  replace_hook();
  static Guard guard;
  device_count = count;
  static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
}
extern "C" void choose(int index) { current_index = index; }
extern "C" int current() { return current_index; }
extern "C" int count() { return device_count; }
