-- Pauses: services and methods whose queued tasks are not offered. The names stand in the clock's hash, which each batch
-- reads anyway.

local function paused_names()
  local names = {}
  for name in string.gmatch(PAUSED or '', '[^\31]+') do names[name] = true end
  return names
end

local function is_paused(method)
  if not PAUSED then return false end
  local names = paused_names()
  return names[method] or names[string.match(method, '^[^/]*')] or false
end

-- service or method, "1" to pause it, "0" to resume it -> changed | unchanged
OPS.pause = function(a)
  local names, list = paused_names(), {}
  if (names[a[1]] or false) == (a[2] == '1') then return { 'unchanged' } end
  names[a[1]] = a[2] == '1' or nil
  for name in pairs(names) do list[#list + 1] = name end
  table.sort(list)
  RESUMED = RESUMED or a[2] ~= '1'
  PAUSED = #list > 0 and table.concat(list, '\31') or false
  WRITES[#WRITES + 1] = PAUSED and { 'HSET', CLOCK, 'paused', PAUSED } or { 'HDEL', CLOCK, 'paused' }
  return { 'changed' }
end
